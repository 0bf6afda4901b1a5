"""What other libraries' training loops call: each module imports its library."""
