"""What a run can do: one dataclass per task, whose fields are its parts and whose `run` is the work."""
