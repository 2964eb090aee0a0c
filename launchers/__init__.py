"""Ships (function, config) to processes: this one, several on this machine. Imports neither torch nor esvit."""
