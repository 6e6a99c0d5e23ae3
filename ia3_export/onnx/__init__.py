"""From a loaded model to ONNX files: chosen, traced, cleaned, converted, packaged."""
