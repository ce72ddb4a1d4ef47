"""What serves full scale: plans of memory and time, jobs, data that stream."""
