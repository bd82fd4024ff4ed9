"""What installed commands time with: timers, ceilings, the machine's description, tables."""
