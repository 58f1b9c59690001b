"""What keeps a run alive, or ends it so that it can continue. No torch import here: launchers read it too."""
