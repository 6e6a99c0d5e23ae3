import click
@click.command("verify")
def verify_command() -> None:
    ""
