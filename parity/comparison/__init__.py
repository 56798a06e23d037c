"""Two traces side by side: what is compared, in which order, and how far apart it may be."""
