"""What may have changed since the last committed point, and one instant of all disks to read it at."""
