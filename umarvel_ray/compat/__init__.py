"""Everything this project uses of its upstreams beyond their public API, one file per upstream."""
