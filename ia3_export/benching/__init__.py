"""``bench``: base, live adapter and merged model side by side, in PyTorch and in ONNX Runtime."""
