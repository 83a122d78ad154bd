// The smoothed training curve: an exponential mean without the pull of its first point (as TensorBoard draws it).
// Points are rows [x, y]; weight 0 gives the points themselves. Points have no gaps: those not finite are marks.

export function smoothed(points, weight) {
  if (weight <= 0) return points.map(([x, y]) => [x, y]);
  let mean = 0;
  let trust = 0;
  return points.map(([x, y]) => {
    mean = weight * mean + (1 - weight) * y;
    trust = weight * trust + (1 - weight);
    return [x, mean / trust];
  });
}
