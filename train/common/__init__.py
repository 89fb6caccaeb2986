"""What every recipe needs: the run's folder, the loop, the images, presets, devices."""
