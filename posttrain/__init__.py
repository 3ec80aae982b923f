"""Teaching: what makes a model that continues text into one that answers."""
