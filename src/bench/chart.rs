//! What reports look like drawn: latency by percentile, and the cost of a delivery by the number of clients.

use super::report::Report;
use super::svg::{Axis, Chart, Scale, Series};

/// The picture of these reports: what a delivery costs if there are several numbers of clients and the server's CPU is
/// known, else latencies.
pub(super) fn of(reports: &[Report]) -> Chart {
    let mut tabs: Vec<u64> = reports.iter().map(|report| report.tabs_count).collect();
    tabs.sort_unstable();
    tabs.dedup();
    match cost(reports) {
        Some(chart) if tabs.len() > 1 => chart,
        _ => latency(reports),
    }
}

/// The server's CPU for a delivery against the number of clients, a line for each label and shape; nothing if no report
/// has it.
pub(super) fn cost(reports: &[Report]) -> Option<Chart> {
    let mut series: Vec<Series> = Vec::new();
    for report in reports {
        let Some(us) = report.server_cpu_per_delivery_us else { continue };
        let name = name(report);
        let point = (report.tabs_count as f64, us);
        match series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => series.push(Series { name, points: vec![point] }),
        }
    }
    for series in &mut series {
        series.points.sort_by(|one, other| one.0.total_cmp(&other.0));
    }
    (!series.is_empty()).then(|| Chart {
        title: "Server CPU for one delivery".to_owned(),
        x: Axis { label: "open clients".to_owned(), scale: Scale::Log },
        y: Axis { label: "CPU a delivery, µs".to_owned(), scale: Scale::Linear },
        series,
        has_dots: true,
    })
}

fn latency(reports: &[Report]) -> Chart {
    let mut labels: Vec<&str> = reports.iter().map(|report| report.label.as_str()).collect();
    labels.sort_unstable();
    labels.dedup();
    let are_told_apart = labels.len() == reports.len();
    let in_full = |report: &Report| format!("{}, {} tabs", name(report), report.tabs_count);
    let lines = reports.iter().map(|report| Series {
        name: if are_told_apart { report.label.clone() } else { in_full(report) },
        points: report.latency_curve.iter().map(|point| (point.share_percent, point.latency_ms)).collect(),
    });
    Chart {
        title: "Latency from the intended moment of sending".to_owned(),
        x: Axis { label: "percentile of deliveries, %".to_owned(), scale: Scale::Nines },
        y: Axis { label: "latency, ms".to_owned(), scale: Scale::Log },
        series: lines.collect(),
        has_dots: false,
    }
}

fn name(report: &Report) -> String {
    let Report { label, in_flight_count, rate_per_second, .. } = report;
    match report.shape.as_str() {
        "closed" => format!("{label}, {in_flight_count} in flight"),
        "open" => format!("{label}, {rate_per_second} messages/s"),
        shape => format!("{label}, {shape}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(label: &str, tabs_count: u64, us: Option<f64>) -> Report {
        let shape = "closed".to_owned();
        let server_cpu_per_delivery_us = us;
        Report {
            label: label.to_owned(),
            shape,
            tabs_count,
            in_flight_count: 1,
            server_cpu_per_delivery_us,
            ..Report::default()
        }
    }

    #[test]
    fn servers_are_lines_and_their_points_are_in_order() {
        let reports = [
            report("a", 5000, Some(2.0)),
            report("b", 1000, Some(3.0)),
            report("a", 1000, Some(1.0)),
            report("c", 1000, None),
        ];
        let chart = of(&reports);
        let lines: Vec<_> = chart.series.iter().map(|line| (line.name.as_str(), line.points.as_slice())).collect();
        assert_eq!(
            lines,
            [
                ("a, 1 in flight", [(1000.0, 1.0), (5000.0, 2.0)].as_slice()),
                ("b, 1 in flight", [(1000.0, 3.0)].as_slice())
            ]
        );
        assert_eq!(of(&reports[..1]).x.scale, Scale::Nines, "one number of clients: latencies");
        assert!(cost(&reports[3..]).is_none());
    }
}
