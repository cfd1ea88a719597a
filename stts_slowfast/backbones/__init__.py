"""One file a family: builds it from a SlowFast config, and says how its tokens lie."""
