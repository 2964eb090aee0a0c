"""Everything a user can choose. Presets are YAML files that say only what differs from their schema. Imports no torch."""
