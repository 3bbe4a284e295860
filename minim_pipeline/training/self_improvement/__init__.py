"""A round of self-improvement: from a pipeline to a better one, by way of ratings."""
