"""What a job does: finds out where it stands, moves rows through the engine, says how far it is."""
