"""Plans are data: who writes what where, which bytes go into which memory. Pure functions, no file, no rank."""
