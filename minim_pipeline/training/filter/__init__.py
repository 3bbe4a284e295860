"""What the filter head learns from: drawn candidates, damaged images, ratings, and thresholds."""
