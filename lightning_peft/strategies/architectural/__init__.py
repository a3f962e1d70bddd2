"""Methods that change how the network is run."""
