"""Choose schedules and measure what they do: tune, analyze, evaluate, compare, bench."""
