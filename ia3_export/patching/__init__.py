"""Patches: how a deployed folder becomes the merged one, without the tensors."""
