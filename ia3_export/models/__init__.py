"""What a model's classes and module names say of its stored tensors."""
