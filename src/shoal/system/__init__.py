"""What the process finds around it: streams, folders, limits of the machine; and what it says to people."""
