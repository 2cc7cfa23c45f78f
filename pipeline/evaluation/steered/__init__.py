"""What an evaluation may give its images besides their conditioning, and what measures how well they follow it."""
