"""Log-likelihoods through a tree of prefixes, each shared token computed once."""
