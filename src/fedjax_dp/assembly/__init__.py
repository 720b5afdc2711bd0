"""From a configuration to the objects of a run: tiles, clients, compiled programs."""
