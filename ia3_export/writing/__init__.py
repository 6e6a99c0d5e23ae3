"""A plan carried out: files laid out, tensors streamed, manifest and card beside them.

Nothing is decided here.
"""
