"""Scripts behind our published figures; one script per figure."""
