"""What looks at training without taking part: meter, guard, watchdog, alerts, profile, names of samples; and what keeps
ranks from waiting for each other: when garbage is collected, and how long a collective may take."""
