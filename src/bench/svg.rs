//! A line chart as SVG: axes with ticks and units, a legend, and colours that read well on light and on dark ground.

use std::fmt::Write;

const WIDTH: f64 = 760.0;
/// What the lines have of the height.
const PLOT: f64 = 300.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 24.0;
/// The first row of the legend, the next one below it, and the room behind the last.
const LEGEND: f64 = 52.0;
const ROW: f64 = 16.0;
const BEHIND_LEGEND: f64 = 28.0;
const BOTTOM: f64 = 56.0;
/// Ticks of a linear axis, about.
const TICKS: f64 = 6.0;
/// Colours, after which they begin again with a dashed line: told apart also by who sees no red or green.
const COLOURS: usize = 6;

const STYLE: &str = "<style>\
    svg{font:12px system-ui,-apple-system,'Segoe UI',sans-serif}\
    .ground{fill:#fff}.grid{stroke:#e3e5e8}.axis{stroke:#8a9099}text{fill:#3b4048}.title{font-size:16px;font-weight:600;\
    fill:#16181c}.line{fill:none;stroke-width:2;stroke-linejoin:round}\
    .dashed{stroke-dasharray:6 4}\
    .c0{stroke:#0072b2}.c1{stroke:#c25a00}.c2{stroke:#00805f}.c3{stroke:#a8417e}.c4{stroke:#5b5bd6}.c5{stroke:#7a6a00}\
    .d0{fill:#0072b2}.d1{fill:#c25a00}.d2{fill:#00805f}.d3{fill:#a8417e}.d4{fill:#5b5bd6}.d5{fill:#7a6a00}\
    @media(prefers-color-scheme:dark){.ground{fill:#14171b}.grid{stroke:#2a2f36}.axis{stroke:#7d8590}text{fill:#c4cad2}\
    .title{fill:#f0f3f6}.c0{stroke:#56b4e9}.c1{stroke:#ff9e4a}.c2{stroke:#3ecf9f}.c3{stroke:#e58fc0}.c4{stroke:#a5a5ff}\
    .c5{stroke:#e0cf50}.d0{fill:#56b4e9}.d1{fill:#ff9e4a}.d2{fill:#3ecf9f}.d3{fill:#e58fc0}.d4{fill:#a5a5ff}\
    .d5{fill:#e0cf50}}</style>";

/// How values are placed on an axis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Scale {
    /// From 0 evenly.
    Linear,
    /// By magnitude.
    Log,
    /// Percentiles: each nine takes as much room as the one before.
    Nines,
}

impl Scale {
    fn place(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Log => value.max(1e-6).log10(),
            Self::Nines => -(1.0 - (value / 100.0).min(0.999_999_9)).log10(),
        }
    }

    /// What the axis reaches from and to, in its own measure.
    fn range(self, values: impl Iterator<Item = f64>) -> (f64, f64) {
        let (mut from, mut to) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.map(|value| self.place(value)).filter(|value| value.is_finite()) {
            (from, to) = (from.min(value), to.max(value));
        }
        if from > to {
            (from, to) = (0.0, 1.0);
        }
        match self {
            Self::Linear => (0.0, if to > 0.0 { to * 1.08 } else { 1.0 }),
            Self::Log => (from - 0.06, (to + 0.06).max(from + 0.3)),
            Self::Nines => (0.0, to.max(1.0)),
        }
    }

    /// Values with a tick within a range.
    fn ticks(self, (from, to): (f64, f64)) -> Vec<f64> {
        match self {
            Self::Linear => {
                let raw = (to / TICKS).max(f64::MIN_POSITIVE);
                let magnitude = 10f64.powf(raw.log10().floor());
                let step = [1.0, 2.0, 5.0, 10.0].map(|step| step * magnitude).into_iter().find(|step| *step >= raw);
                let step = step.unwrap_or(raw);
                (0..).map(|tick| f64::from(tick) * step).take_while(|value| *value <= to).collect()
            }
            Self::Log => {
                let steps: &[f64] = if to - from > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
                #[expect(clippy::cast_possible_truncation, reason = "magnitudes are small")]
                let magnitudes = from.floor() as i32..=to.ceil() as i32;
                let values = magnitudes.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
                values.filter(|value| (from..=to).contains(&value.log10())).collect()
            }
            Self::Nines => {
                let values = [0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999, 99.9999];
                values.into_iter().filter(|value| self.place(*value) <= to + 1e-9).collect()
            }
        }
    }
}

/// One axis.
#[derive(Debug, Clone)]
pub(super) struct Axis {
    /// What it shows, with its unit.
    pub(super) label: String,
    pub(super) scale: Scale,
}

/// A line.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) series: Vec<Series>,
    /// Points are shown themselves, not only the line through them.
    pub(super) has_dots: bool,
}

impl Chart {
    /// The picture.
    pub(super) fn to_svg(&self) -> String {
        let names = self.legend();
        let top = names.last().map_or(LEGEND, |(_, y)| *y) + BEHIND_LEGEND;
        let height = top + PLOT + BOTTOM;
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x_range = self.x.scale.range(points().map(|(x, _)| *x));
        let y_range = self.y.scale.range(points().map(|(_, y)| *y));
        let across = |value: f64| {
            LEFT + (self.x.scale.place(value) - x_range.0) / (x_range.1 - x_range.0) * (WIDTH - LEFT - RIGHT)
        };
        let down = |value: f64| top + PLOT - (self.y.scale.place(value) - y_range.0) / (y_range.1 - y_range.0) * PLOT;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">\
             <title>{0}</title>{STYLE}<rect class=\"ground\" width=\"{WIDTH}\" height=\"{height}\"/>\
             <text class=\"title\" x=\"{LEFT}\" y=\"30\">{0}</text>\n",
            escaped(&self.title)
        );
        for (at, (series, (x, y))) in self.series.iter().zip(&names).enumerate() {
            let _ = writeln!(
                out,
                "<line class=\"{}\" x1=\"{x:.1}\" x2=\"{:.1}\" y1=\"{y}\" y2=\"{y}\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{}</text>",
                class(at),
                x + 18.0,
                x + 24.0,
                y + 4.0,
                escaped(&series.name)
            );
        }
        let (bottom, right) = (top + PLOT, WIDTH - RIGHT);
        // Writing to a string does not fail.
        for value in self.y.scale.ticks(y_range) {
            let (y, text) = (down(value), number(value));
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
                LEFT - 8.0,
                y + 4.0
            );
        }
        for value in self.x.scale.ticks(x_range) {
            let (x, text) = (across(value), number(value));
            let _ = writeln!(
                out,
                "<line class=\"axis\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{bottom}\" y2=\"{:.1}\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
                bottom + 5.0,
                bottom + 20.0
            );
        }
        let (middle_x, middle_y) = (f64::midpoint(LEFT, right), f64::midpoint(top, bottom));
        let _ = writeln!(
            out,
            "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\
             <text x=\"{middle_x}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text transform=\"translate(20 {middle_y}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            height - 14.0,
            escaped(&self.x.label),
            escaped(&self.y.label)
        );
        for (at, series) in self.series.iter().enumerate() {
            self.line(&mut out, at, series, (&across, &down));
        }
        out.push_str("</svg>\n");
        out
    }

    fn line(
        &self,
        out: &mut String,
        at: usize,
        series: &Series,
        (across, down): (&dyn Fn(f64) -> f64, &dyn Fn(f64) -> f64),
    ) {
        let (class, colour) = (class(at), at % COLOURS);
        let _ = write!(out, "<polyline class=\"{class}\" points=\"");
        for (x, y) in &series.points {
            let _ = write!(out, "{:.1},{:.1} ", across(*x), down(*y));
        }
        out.push_str("\"/>\n");
        if self.has_dots {
            for (x, y) in &series.points {
                let (across, down) = (across(*x), down(*y));
                let _ = writeln!(
                    out,
                    "<circle class=\"d{colour}\" cx=\"{across:.1}\" cy=\"{down:.1}\" r=\"4\"><title>{}: {} at {}</title>\
                     </circle>",
                    escaped(&series.name),
                    number(*y),
                    number(*x)
                );
            }
        }
    }

    /// Where each name stands: beside each other, in as many rows as they need.
    fn legend(&self) -> Vec<(f64, f64)> {
        let (mut x, mut y) = (LEFT, LEGEND);
        let place = |series: &Series| {
            // About what a character of this size is wide.
            let width = 34.0 + 6.6 * series.name.chars().count() as f64;
            if x + width > WIDTH - RIGHT && x > LEFT {
                (x, y) = (LEFT, y + ROW);
            }
            let here = (x, y);
            x += width;
            here
        };
        self.series.iter().map(place).collect()
    }
}

/// What a line looks like.
fn class(at: usize) -> String {
    format!("line c{}{}", at % COLOURS, if at / COLOURS % 2 == 1 { " dashed" } else { "" })
}

/// A number for people: as many digits as it needs, thousands apart.
fn number(value: f64) -> String {
    if value >= 1000.0 {
        let digits = format!("{value:.0}");
        let mut text = String::new();
        for (at, digit) in digits.chars().enumerate() {
            if at > 0 && (digits.len() - at).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        return text;
    }
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(scale: Scale, values: &[f64]) -> Vec<String> {
        scale.ticks(scale.range(values.iter().copied())).into_iter().map(number).collect()
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(Scale::Linear, &[4.3]), ["0", "1", "2", "3", "4"]);
        assert_eq!(ticks(Scale::Linear, &[0.7]), ["0", "0.2", "0.4", "0.6"]);
        assert_eq!(ticks(Scale::Log, &[1000.0, 10_000.0]), ["1,000", "2,000", "5,000", "10,000"]);
        assert_eq!(ticks(Scale::Log, &[0.02, 900.0]), ["0.1", "1", "10", "100", "1,000"]);
        assert_eq!(ticks(Scale::Nines, &[50.0, 99.9]), ["0", "50", "90", "99", "99.9"]);
        assert_eq!(ticks(Scale::Linear, &[]).first().map(String::as_str), Some("0"));
    }

    #[test]
    fn a_chart_has_all_its_names_and_points() {
        let axis = |label: &str, scale| Axis { label: label.to_owned(), scale };
        let points = vec![(1000.0, 4.0), (10_000.0, 5.5)];
        let series = |name: &str| Series { name: name.to_owned(), points: points.clone() };
        let chart = Chart {
            title: "Cost <of> a delivery".to_owned(),
            x: axis("tabs", Scale::Log),
            y: axis("µs of CPU", Scale::Linear),
            series: vec![series("a & b"), series("c")],
            has_dots: true,
        };
        let svg = chart.to_svg();
        for part in ["Cost &lt;of&gt; a delivery", "a &amp; b", "µs of CPU", ">10,000<", "prefers-color-scheme:dark"] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        assert_eq!((svg.matches("<circle").count(), svg.matches("<polyline").count()), (4, 2));
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let empty = Chart { series: vec![Series { name: String::new(), points: Vec::new() }], ..chart };
        assert!(!empty.to_svg().contains("NaN"));
    }
}
