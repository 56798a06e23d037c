"""Every model, method and plan against one device: the cells, and the page that tells their state."""
