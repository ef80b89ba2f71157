"""Files: strangers' documents, limits of reading, atomic writes, tensor files. Knows nothing of models or cells."""
