"""What every connection stands on: channel, proxies, accounts of what is held, work off the event loop."""
