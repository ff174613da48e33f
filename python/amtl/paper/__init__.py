"""Every method at equal bytes: the runs, what is made of them, and the page that shows it."""
