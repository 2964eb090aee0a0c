"""Plain, slow forms of what `esvit` does cleverly: what tests compare with and benchmarks measure against."""
