//! What `tabcast top` knows and shows: the newest frame, its history, the connection, and what its user has asked for.
//! Pure: keys and updates in, with the time; nothing here knows a terminal.

use std::time::{Duration, Instant};

use super::connection::Update;
use super::history::History;
use super::status::{Ended, Status, User};

/// Frames come once a second: after so long without one what is shown is old, and that is said.
const STALE_AFTER: Duration = Duration::from_secs(3);
/// Characters of a filter: more than any user id.
const FILTER_CHARS_MAX: usize = 256;

/// What lies over the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Over {
    #[default]
    Nothing,
    Help,
    /// All of the chosen disconnect.
    Ending,
}

/// What a key press means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Key {
    Char(char),
    Enter,
    Escape,
    Backspace,
    Up,
    Down,
    /// Ctrl-C.
    Interrupt,
}

/// Whether it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(super) enum Next {
    Go,
    Leave,
}

/// Everything that is drawn.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) status: Option<Status>,
    pub(super) history: History,
    heard: Option<Instant>,
    /// Why there is no connection.
    pub(super) lost: Option<String>,
    pub(super) filter: String,
    pub(super) is_typing: bool,
    chosen: usize,
    pub(super) over: Over,
}

impl View {
    pub(super) fn new(filter: &str) -> Self {
        Self { filter: filter.chars().take(FILTER_CHARS_MAX).collect(), ..Self::default() }
    }

    /// Takes what came at `now`. A refusal is for whoever runs this.
    pub(super) fn handle_update(&mut self, update: Update, now: Instant) {
        match update {
            // Until a frame comes, what was said before stands.
            Update::Open => {}
            Update::Event(event) => match Status::read(&event) {
                Ok(Some(status)) => {
                    self.history.add(&status);
                    self.keep_choice(&status);
                    (self.status, self.heard, self.lost) = (Some(status), Some(now), None);
                }
                Ok(None) => {}
                Err(error) => self.lost = Some(format!("a frame that cannot be read: {error}")),
            },
            Update::Lost { reason, .. } => self.lost = Some(reason),
            Update::Refused(refusal) => self.lost = Some(refusal.to_string()),
        }
    }

    /// The chosen disconnect stays chosen when newer ones come before it.
    fn keep_choice(&mut self, new: &Status) {
        let Some(chosen) = self.chosen() else { return };
        let same = |ended: &&Ended| ended.session == chosen.session && ended.at == chosen.at;
        let place = self.endings_of(new).position(|ended| same(&ended));
        self.chosen = place.unwrap_or(0);
    }

    /// How old what is shown is, if it is too old.
    pub(super) fn stale(&self, now: Instant) -> Option<Duration> {
        let age = now.saturating_duration_since(self.heard?);
        (age >= STALE_AFTER).then_some(age)
    }

    pub(super) fn handle_key(&mut self, key: Key) -> Next {
        match key {
            Key::Interrupt => return Next::Leave,
            _ if self.is_typing => self.type_filter(key),
            _ if self.over != Over::Nothing => self.over = Over::Nothing,
            Key::Char('q') => return Next::Leave,
            Key::Char('/') => self.is_typing = true,
            Key::Char('?') => self.over = Over::Help,
            Key::Char('j') | Key::Down => self.chosen = (self.chosen + 1).min(self.endings().count().saturating_sub(1)),
            Key::Char('k') | Key::Up => self.chosen = self.chosen.saturating_sub(1),
            Key::Enter if self.chosen().is_some() => self.over = Over::Ending,
            Key::Escape => self.replace_filter(String::new()),
            _ => {}
        }
        Next::Go
    }

    fn type_filter(&mut self, key: Key) {
        let mut filter = self.filter.clone();
        match key {
            Key::Char(character) if !character.is_control() && filter.chars().count() < FILTER_CHARS_MAX => {
                filter.push(character);
            }
            Key::Backspace => drop(filter.pop()),
            Key::Enter => self.is_typing = false,
            Key::Escape => {
                self.is_typing = false;
                filter.clear();
            }
            _ => {}
        }
        self.replace_filter(filter);
    }

    fn replace_filter(&mut self, filter: String) {
        if filter != self.filter {
            (self.filter, self.chosen) = (filter, 0);
        }
    }

    fn wants(&self, user: &str) -> bool {
        self.filter.is_empty() || user.to_lowercase().contains(&self.filter.to_lowercase())
    }

    /// The users that pass the filter.
    pub(super) fn users(&self) -> impl Iterator<Item = &User> {
        self.status.iter().flat_map(|status| &status.top_users).filter(|user| self.wants(&user.user_id))
    }

    /// The disconnects that pass the filter, newest first.
    pub(super) fn endings(&self) -> impl Iterator<Item = &Ended> {
        self.status.iter().flat_map(|status| self.endings_of(status))
    }

    fn endings_of<'a>(&'a self, status: &'a Status) -> impl Iterator<Item = &'a Ended> {
        status.ended.iter().filter(|ended| self.wants(ended.user()))
    }

    /// The place of the chosen disconnect among [`View::endings`].
    pub(super) fn chosen_place(&self) -> usize {
        self.chosen
    }

    pub(super) fn chosen(&self) -> Option<&Ended> {
        self.endings().nth(self.chosen)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::status::tests::WHOLE;
    use super::*;
    use crate::driver::clock;

    /// A view that has heard `events`.
    pub(in crate::terminal) fn view(events: &[&str]) -> (View, Instant) {
        let (mut view, now) = (View::default(), clock::now());
        for event in events {
            view.handle_update(Update::Event((*event).to_owned()), now);
        }
        (view, now)
    }

    fn press(view: &mut View, keys: &str) {
        for key in keys.chars() {
            let key = match key {
                '\n' => Key::Enter,
                '\u{1b}' => Key::Escape,
                '\u{8}' => Key::Backspace,
                '↓' => Key::Down,
                '↑' => Key::Up,
                other => Key::Char(other),
            };
            assert_eq!(view.handle_key(key), Next::Go);
        }
    }

    fn users(view: &View) -> Vec<&str> {
        view.endings().map(Ended::user).collect()
    }

    #[test]
    fn a_filter_is_typed_and_taken_back() {
        let (mut view, _) = view(&[WHOLE]);
        assert_eq!(users(&view), ["ann", "bob"]);
        press(&mut view, "/BOx\u{8}");
        assert!(view.is_typing);
        assert_eq!((users(&view), view.users().count()), (vec!["bob"], 1));
        press(&mut view, "q\u{8}\n");
        assert!(!view.is_typing, "while it is typed, q is a letter");
        press(&mut view, "\u{1b}");
        assert_eq!(users(&view), ["ann", "bob"]);
        assert_eq!(view.handle_key(Key::Char('q')), Next::Leave);
        view.is_typing = true;
        assert_eq!(view.handle_key(Key::Interrupt), Next::Leave);
    }

    #[test]
    fn what_is_chosen_stays_chosen() {
        let (mut view, now) = view(&[WHOLE]);
        press(&mut view, "↑↓↓↓");
        assert_eq!(view.chosen().unwrap().user(), "bob");
        press(&mut view, "\n");
        assert_eq!(view.over, Over::Ending);
        let newer =
            WHOLE.replace("\"ended\":[", "\"ended\":[{\"at\":1764115201.0,\"user_id\":\"eve\",\"session\":\"5\"},");
        view.handle_update(Update::Event(newer), now);
        assert_eq!((view.chosen_place(), view.chosen().unwrap().user()), (2, "bob"));
        press(&mut view, "x");
        assert_eq!(view.over, Over::Nothing);
        view.handle_update(Update::Event(r#"{"type":"status"}"#.to_owned()), now);
        assert!(view.chosen().is_none());
        press(&mut view, "\n?");
        assert_eq!(view.over, Over::Help);
    }

    #[test]
    fn what_is_old_is_said_to_be() {
        let (mut view, now) = view(&[]);
        assert_eq!(view.stale(now + Duration::from_secs(9)), None, "nothing was shown yet");
        view.handle_update(Update::Event(WHOLE.to_owned()), now);
        assert_eq!(view.stale(now + Duration::from_secs(2)), None);
        assert_eq!(view.stale(now + Duration::from_secs(5)), Some(Duration::from_secs(5)));
        view.handle_update(Update::Lost { reason: "gone".to_owned(), pause: Duration::ZERO }, now);
        assert_eq!(view.lost.as_deref(), Some("gone"));
        view.handle_update(Update::Open, now);
        view.handle_update(Update::Event(r#"{"type":"pong"}"#.to_owned()), now);
        assert_eq!(view.lost.as_deref(), Some("gone"), "until a frame has come");
        view.handle_update(Update::Event(WHOLE.to_owned()), now);
        assert_eq!(view.lost, None);
    }
}
