"""The primary site: cycles that turn images into deltas and ship them, on schedule, with their state."""
