"""All use of other packages' private names, one file per package, checked on import."""
