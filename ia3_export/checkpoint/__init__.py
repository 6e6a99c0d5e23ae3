"""A base model on disk, in whichever format: headers, byte ranges, side files. Never instantiated."""
