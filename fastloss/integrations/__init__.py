"""fastloss inside other libraries. Nothing here imports those libraries before it is asked to."""
