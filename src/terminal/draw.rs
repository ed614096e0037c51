//! The picture of `tabcast top`: a [`View`] into the cells of a terminal of any size. Everything is there at 60 × 15; more
//! room gives larger curves and longer lists.

use std::time::Instant;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph, Row, Sparkline, Table, TableState, Wrap};

use super::history::Curve;
use super::once::{redis, why};
use super::status::{Ended, Shard, Status};
use super::text::{ago, bytes, clean, count, micros, percent, rate, seconds, time_of_day, whole};
use super::view::{Over, View};

/// Columns and lines from which there is room for everything side by side.
const WIDE: u16 = 110;
const TALL: u16 = 24;
/// Columns of a shard, and of its bar.
const SHARD_COLUMNS: u16 = 29;
const BAR_COLUMNS: usize = 10;
/// Lines of users where they stand above the disconnects.
const USERS_LINES: u16 = 4;

/// With colours or without; nothing is said by a colour alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ink {
    Colours,
    Plain,
}

impl Ink {
    /// As `NO_COLOR` (no-color.org) asks for.
    pub(super) fn of_environment() -> Self {
        let is_asked = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        if is_asked { Self::Plain } else { Self::Colours }
    }

    fn coloured(self, style: Style, colour: Color) -> Style {
        if self == Self::Colours { style.fg(colour) } else { style }
    }

    fn good(self) -> Style {
        self.coloured(Style::new().add_modifier(Modifier::BOLD), Color::Green)
    }

    fn bad(self) -> Style {
        self.coloured(Style::new().add_modifier(Modifier::BOLD | Modifier::REVERSED), Color::Red)
    }

    fn curve(self) -> Style {
        self.coloured(Style::new(), Color::Cyan)
    }

    fn title(self) -> Style {
        self.coloured(Style::new().add_modifier(Modifier::BOLD), Color::Yellow)
    }
}

/// Draws all of it. `url` is where the node is.
pub(super) fn draw(frame: &mut Frame<'_>, view: &View, url: &str, now: Instant, ink: Ink) {
    let area = frame.area();
    let is_wide = area.width >= WIDE && area.height >= TALL;
    let shards = view.status.as_ref().map_or(0, |status| status.shards.len());
    let [header, charts, shard_area, redis_area, lists, footer] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(if is_wide { 6 } else { 4 }),
        Constraint::Length(shard_lines(shards, area)),
        Constraint::Length(1),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(head(view, url, now, ink), header);
    frame.render_widget(foot(view), footer);
    if let Some(status) = &view.status {
        draw_charts(frame, charts, (view, status), is_wide, ink);
        frame.render_widget(shard_bars(&status.shards, shard_area, ink), shard_area);
        frame.render_widget(redis_line(status, ink), redis_area);
        draw_lists(frame, lists, view, is_wide, ink);
    }
    match view.over {
        Over::Nothing => {}
        Over::Help => draw_over(frame, " help ", help()),
        Over::Ending => {
            if let Some(ended) = view.chosen() {
                draw_over(frame, " why it ended ", ending(ended));
            }
        }
    }
}

/// The most important first: a narrow terminal cuts off the end.
fn head(view: &View, url: &str, now: Instant, ink: Ink) -> Line<'static> {
    let mut spans = Vec::new();
    let mut bad = |text: String| spans.push(Span::styled(format!(" {text} "), ink.bad()));
    if let Some(age) = view.stale(now) {
        bad(format!("{} OLD", ago(age)));
    }
    if let Some(reason) = &view.lost {
        bad(format!("NO STATUS: {}", clean(reason)));
    }
    let Some(status) = &view.status else {
        spans.push(Span::raw(format!(" waiting for {}", clean(url))));
        return Line::from(spans);
    };
    let (health, is_good) = status.health();
    spans.push(Span::styled(format!(" {health} "), if is_good { ink.good() } else { ink.bad() }));
    let Status { node, version, mode, .. } = status;
    spans.push(Span::raw(format!(" {node}  up {}  tabcast {version}  {mode}", seconds(status.uptime_seconds))));
    if let (Some(memory), Some(cpu)) = (status.process.resident_bytes, status.process.cpu_share) {
        spans.push(Span::raw(format!("  {}  CPU {}", bytes(memory), percent(cpu))));
    }
    Line::from(spans)
}

fn foot(view: &View) -> Line<'static> {
    let filter = clean(&view.filter);
    if view.is_typing {
        return Line::from(format!(" /{filter}▏  Enter keeps it, Esc takes it back"));
    }
    let filter = if filter.is_empty() { String::new() } else { format!("  only `{filter}` (Esc: all)") };
    Line::from(format!(" q quit  / filter  ↑↓ choose  Enter why  ? help{filter}"))
}

/// A curve, its name, its newest value, and how its most is written.
type Titled = (Curve, &'static str, String, fn(f64) -> String);

fn curves(status: &Status) -> [Titled; 4] {
    let p99 = status.latency_micros.p99.map_or_else(|| "none".to_owned(), micros);
    let of = |now: String, max: String| format!("{now} of {max}");
    [
        (Curve::Sessions, "sessions", of(count(status.sessions.now), count(status.sessions.max)), count),
        (Curve::Deliveries, "deliveries/s", rate(status.rates.deliveries), rate),
        (Curve::P99, "p99", p99, micros),
        (Curve::QueuedBytes, "queued", of(bytes(status.queues.bytes), bytes(status.queues.budget_bytes)), bytes),
    ]
}

fn draw_charts(frame: &mut Frame<'_>, area: Rect, (view, status): (&View, &Status), is_wide: bool, ink: Ink) {
    let cells: Vec<Rect> = if is_wide {
        Layout::horizontal([Constraint::Fill(1); 4]).spacing(1).split(area).to_vec()
    } else {
        let lines = Layout::vertical([Constraint::Length(2); 2]).split(area);
        lines
            .iter()
            .flat_map(|line| Layout::horizontal([Constraint::Fill(1); 2]).spacing(1).split(*line).to_vec())
            .collect()
    };
    for (cell, (curve, name, value, written)) in cells.into_iter().zip(curves(status)) {
        let [title, chart] = Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(cell);
        let most = format!("max {}", written(view.history.most(curve)));
        let line = Line::from(vec![
            Span::styled(format!("{name} "), ink.title()),
            Span::styled(value, Style::new().add_modifier(Modifier::BOLD)),
        ]);
        let room = usize::from(title.width).saturating_sub(line.width());
        frame.render_widget(line, title);
        if room > most.len() {
            frame.render_widget(Line::from(most).right_aligned(), title);
        }
        let columns: Vec<u64> = view.history.columns(curve, usize::from(chart.width)).into_iter().map(whole).collect();
        frame.render_widget(Sparkline::default().data(columns).style(ink.curve()), chart);
    }
}

/// Shards in a line.
fn shards_a_line(width: u16) -> usize {
    usize::from(width / SHARD_COLUMNS).max(1)
}

fn shard_lines(shards: usize, area: Rect) -> u16 {
    let most = if area.height >= TALL { 6 } else { 2 };
    u16::try_from(shards.div_ceil(shards_a_line(area.width))).unwrap_or(u16::MAX).min(most)
}

fn shard_bars(shards: &[Shard], area: Rect, ink: Ink) -> Paragraph<'static> {
    let a_line = shards_a_line(area.width);
    let places = a_line * usize::from(area.height);
    let shown = if shards.len() > places { places.saturating_sub(1) } else { shards.len() };
    let mut cells: Vec<Vec<Span<'static>>> =
        shards.iter().take(shown).enumerate().map(|(at, shard)| cell(at, shard, ink)).collect();
    if shown < shards.len() {
        cells.push(vec![Span::raw(format!("… and {} more shards", shards.len() - shown))]);
    }
    Paragraph::new(cells.chunks(a_line).map(|cells| Line::from(cells.concat())).collect::<Vec<_>>())
}

fn cell(number: usize, shard: &Shard, ink: Ink) -> Vec<Span<'static>> {
    let share = if shard.busy_share.is_finite() { shard.busy_share.clamp(0.0, 1.0) } else { 0.0 };
    let full = usize::try_from(whole(share * 10.0)).unwrap_or(0).min(BAR_COLUMNS);
    let bar = "█".repeat(full) + &"·".repeat(BAR_COLUMNS - full);
    vec![
        Span::styled(format!("{number:>3} "), ink.title()),
        Span::styled(bar, ink.curve()),
        Span::raw(format!("{:>6} {:>7}", percent(share), count(shard.sessions))),
        Span::raw(" "),
    ]
}

fn redis_line(status: &Status, ink: Ink) -> Line<'static> {
    let text = redis(status);
    let is_bad = status.redis.as_ref().is_some_and(|redis| !redis.healthy);
    let style = if is_bad { ink.bad() } else { Style::new() };
    Line::from(vec![Span::styled("redis ", ink.title()), Span::styled(text, style)])
}

fn draw_lists(frame: &mut Frame<'_>, area: Rect, view: &View, is_wide: bool, ink: Ink) {
    let [users, endings] = if is_wide {
        Layout::horizontal([Constraint::Percentage(35), Constraint::Percentage(65)]).spacing(1).areas(area)
    } else {
        Layout::vertical([Constraint::Length(USERS_LINES.min(area.height / 2)), Constraint::Min(0)]).areas(area)
    };
    draw_users(frame, users, view, ink);
    draw_endings(frame, endings, view, ink);
}

fn draw_users(frame: &mut Frame<'_>, area: Rect, view: &View, ink: Ink) {
    let rows = view.users().map(|user| {
        Row::new([user.user_id.to_string(), count(user.tabs), count(user.queue_frames), bytes(user.queue_bytes)])
    });
    let widths = [Constraint::Fill(1), Constraint::Length(5), Constraint::Length(7), Constraint::Length(9)];
    let head = Row::new(["top users", "tabs", "frames", "waiting"]).style(ink.title());
    frame.render_widget(Table::new(rows, widths).header(head), area);
}

fn draw_endings(frame: &mut Frame<'_>, area: Rect, view: &View, ink: Ink) {
    let rows = view.endings().map(|ended| {
        let code = ended.code.map_or_else(String::new, |code| code.to_string());
        let lasted = ended.connected_seconds.map_or_else(String::new, seconds);
        let frames = ended.queue_frames.map_or_else(String::new, count);
        Row::new([time_of_day(ended.at), ended.user().to_owned(), ended.reason.to_string(), code, lasted, frames])
    });
    let widths = [
        Constraint::Length(8),
        Constraint::Fill(2),
        Constraint::Fill(3),
        Constraint::Length(4),
        Constraint::Length(9),
        Constraint::Length(6),
    ];
    let head = Row::new(["ended", "user", "reason", "code", "after", "frames"]).style(ink.title());
    let chosen = Style::new().add_modifier(Modifier::REVERSED);
    let table = Table::new(rows, widths).header(head).row_highlight_style(chosen);
    let mut state = TableState::default();
    if view.chosen().is_some() {
        state.select(Some(view.chosen_place()));
    }
    frame.render_stateful_widget(table, area, &mut state);
}

fn ending(ended: &Ended) -> Vec<Line<'static>> {
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let mut lines =
        vec![Line::styled(format!("{} at {} UTC", ended.user(), time_of_day(ended.at)), bold), Line::from(why(ended))];
    if let Some(detail) = &ended.detail {
        lines.push(Line::default());
        lines.push(Line::from(detail.to_string()));
    }
    lines
}

fn help() -> Vec<Line<'static>> {
    let lines = [
        "Curves are five minutes, newest at the right. Times are UTC.",
        "shards: number, how busy its thread is, sessions.",
        "/  only users whose id has a text in it   Esc  all",
        "↑ ↓ (k, j)  choose a disconnect   Enter  why it ended",
        "q, Ctrl-C  quit   any key  closes this",
    ];
    lines.into_iter().map(Line::from).collect()
}

/// A box in the middle.
fn draw_over(frame: &mut Frame<'_>, title: &'static str, lines: Vec<Line<'static>>) {
    let area = frame.area();
    let width = area.width.saturating_sub(4).min(84);
    let inner = usize::from(width.saturating_sub(2)).max(1);
    let needed: usize = lines.iter().map(|line| line.width().div_ceil(inner).max(1)).sum();
    // Words that do not fit go to the next line: some more than what the letters need.
    let height = u16::try_from(needed + lines.len() + 2).unwrap_or(u16::MAX).min(area.height);
    let place = Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 2, width, height };
    frame.render_widget(Clear, place);
    frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: false }).block(Block::bordered().title(title)), place);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::connection::Update;
    use super::super::status::tests::WHOLE;
    use super::super::view::Key;
    use super::super::view::tests::view;
    use super::*;

    fn terminal(view: &View, (width, height): (u16, u16), now: Instant, ink: Ink) -> Terminal<TestBackend> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, view, "http://127.0.0.1:8080", now, ink)).unwrap();
        terminal
    }

    /// The lines that are drawn.
    fn drawn(view: &View, size: (u16, u16), now: Instant) -> Vec<String> {
        let terminal = terminal(view, size, now, Ink::Plain);
        let cells = terminal.backend().buffer().content();
        let lines = cells.chunks(usize::from(size.0));
        lines
            .map(|line| line.iter().map(ratatui::buffer::Cell::symbol).collect::<String>().trim_end().to_owned())
            .collect()
    }

    #[track_caller]
    fn has(lines: &[String], parts: &[&str]) {
        for part in parts {
            assert!(lines.iter().any(|line| line.contains(part)), "{part}\n{}", lines.join("\n"));
        }
    }

    const EVERYTHING: [&str; 14] = [
        " READY ",
        "n1  up 12.5 s",
        "sessions 5 of 10,000",
        "deliveries/s 5.0",
        "p99 120 µs",
        "queued 2.0 KiB of 256 MiB",
        "  0 ··········   1 %       2",
        "  1 █████·····  50 %       3",
        "redis healthy, canary 140 µs, 2 nodes, spool 0 B",
        "top users",
        "ann",
        "23:59:59 ann",
        "slow consumer",
        "q quit  / filter",
    ];

    #[test]
    fn everything_is_there_from_60_by_15_on() {
        let (view, now) = view(&[WHOLE; 5]);
        for size in [(60, 15), (80, 24), (110, 24), (120, 40), (250, 80)] {
            has(&drawn(&view, size, now), &EVERYTHING);
        }
        let lines = drawn(&view, (120, 40), now);
        let at = |part: &str| lines.iter().position(|line| line.contains(part)).unwrap();
        assert_eq!(at("top users"), at("ended"), "side by side");
        assert!(lines[1].contains("sessions") && lines[1].contains("queued"), "{}", lines[1]);
    }

    #[test]
    fn any_size_is_survived() {
        let (mut view, now) = view(&[WHOLE]);
        for over in [Over::Nothing, Over::Help, Over::Ending] {
            view.over = over;
            for (width, height) in
                (1..70).step_by(8).flat_map(|width| (1..20).step_by(3).map(move |height| (width, height)))
            {
                drawn(&view, (width, height), now);
            }
        }
    }

    #[test]
    fn before_the_first_frame_and_after_the_last() {
        let (mut view, now) = view(&[]);
        has(&drawn(&view, (60, 15), now), &["waiting for http://127.0.0.1:8080", "q quit"]);
        view.handle_update(Update::Lost { reason: "refused".to_owned(), pause: Duration::ZERO }, now);
        has(&drawn(&view, (60, 15), now), &["NO STATUS: refused"]);
        view.handle_update(Update::Event(WHOLE.to_owned()), now);
        has(&drawn(&view, (60, 15), now + Duration::from_secs(7)), &["7 s OLD", "sessions 5 of 10,000"]);
        view.handle_update(Update::Event(r#"{"type":"status"}"#.to_owned()), now);
        has(&drawn(&view, (60, 15), now), &["NOT READY", "p99 none", "redis none"]);
        let away = WHOLE.replace(r#""healthy":true,"reason":null"#, r#""healthy":false,"reason":"no answer""#);
        view.handle_update(Update::Event(away), now);
        has(&drawn(&view, (60, 15), now), &["redis NOT HEALTHY: no answer"]);
    }

    #[test]
    fn enter_tells_the_whole_sentence() {
        let (mut view, now) = view(&[WHOLE]);
        let _ = view.handle_key(Key::Enter);
        let lines = drawn(&view, (60, 15), now);
        has(
            &lines,
            &[
                "why it ended",
                "ann at 23:59:59 UTC",
                "slow consumer (4008)",
                "its queue held 1,024 frames",
                "limit is 1,024 frames",
            ],
        );
        let _ = view.handle_key(Key::Escape);
        let _ = view.handle_key(Key::Char('?'));
        has(&drawn(&view, (60, 15), now), &["any key  closes this"]);
        let _ = view.handle_key(Key::Escape);
        for key in "/bob".chars() {
            let _ = view.handle_key(Key::Char(key));
        }
        let lines = drawn(&view, (60, 15), now);
        has(&lines, &["/bob", "kicked"]);
        assert!(lines.iter().all(|line| !line.contains("ann")));
    }

    #[test]
    fn more_shards_than_there_is_room_for_are_counted() {
        let shards = vec![r#"{"sessions":1,"busy_share":7}"#; 64].join(",");
        let (view, now) = view(&[&format!(r#"{{"type":"status","shards":[{shards}]}}"#)]);
        has(&drawn(&view, (60, 15), now), &["  0 ██████████ 100 %", "… and 61 more shards"]);
        has(&drawn(&view, (120, 40), now), &["… and 41 more shards"]);
    }

    #[test]
    fn no_escape_sequence_of_a_user_id_reaches_the_terminal_and_no_colour_if_none_is_wanted() {
        let hostile = WHOLE.replace("ann", r"\u001b[2J\u009bH\u202e\u0007\r\n").replace("\"n1\"", r#""\u001bc""#);
        let (mut view, now) = view(&[&hostile]);
        for over in [Over::Nothing, Over::Ending] {
            view.over = over;
            let terminal = terminal(&view, (100, 30), now, Ink::Plain);
            for cell in terminal.backend().buffer().content() {
                assert!(!cell.symbol().chars().any(char::is_control), "{:?}", cell.symbol());
                assert_eq!((cell.fg, cell.bg), (Color::Reset, Color::Reset));
            }
        }
        has(&drawn(&view, (100, 30), now), &["\\u{1b}[2J"]);
        let coloured = terminal(&view, (100, 30), now, Ink::Colours);
        assert!(coloured.backend().buffer().content().iter().any(|cell| cell.fg == Color::Cyan));
    }
}
