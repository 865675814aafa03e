"""Choose schedules and measure their effects: tune, analyze, evaluate, compare and bench."""
