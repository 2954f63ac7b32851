"""One file per method, named as in the papers. `kullback methods` lists them."""
