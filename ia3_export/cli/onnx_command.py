import click
@click.command("onnx")
def onnx_command() -> None:
    ""
