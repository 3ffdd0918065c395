"""Does SELM explore? The paper's experiments in a world whose expected true reward is an exact sum."""
