"""What schedules do to a pipeline's images: made once, kept in a folder, measured in many ways."""
