"""What looks at training without taking part: meter, guard, watchdog, alerts, names of samples."""
