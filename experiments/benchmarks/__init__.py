"""What this project costs beside what others cost: time and memory, measured in one run."""
