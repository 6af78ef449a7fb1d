"""One solve: its steps, when it stops, its derivative, and callbacks of programs."""
