"""Files: documents of strangers, limits of what is read, atomic writes, tensor files. Knows nothing of models or cells."""
