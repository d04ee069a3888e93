"""Every knob of the house, typed; never imports torch."""
