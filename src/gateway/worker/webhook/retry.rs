//! How long to wait before the next attempt.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::header::HeaderValue;
use uuid::Uuid;

use crate::gateway::worker::webhook::WebhookSettings;

/// The longest that a `Retry-After` is believed: far over any `message_timeout`.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Full jitter: a random part of a bound that doubles with each attempt, from the first on, up to `backoff_max`.
pub(super) fn backoff(settings: &WebhookSettings, attempts: u32) -> Duration {
    let factor = 1_u32.checked_shl(attempts.saturating_sub(1)).unwrap_or(u32::MAX);
    let bound = settings.backoff_base.saturating_mul(factor).min(settings.backoff_max);
    // The low half of a random UUID but for its top two bits, as a fraction of one.
    let random = Uuid::new_v4().as_u64_pair().1 & ((1 << 32) - 1);
    bound.mul_f64(random as f64 / (1_u64 << 32) as f64)
}

/// `Retry-After` as a pause: a number of seconds or an HTTP date (RFC 9110, section 10.2.3). Nothing, or what cannot
/// be read, is no pause.
pub(super) fn retry_after(value: Option<&HeaderValue>, now: SystemTime) -> Duration {
    let Some(text) = value.and_then(|value| value.to_str().ok()).map(str::trim) else { return Duration::ZERO };
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().map_or(RETRY_AFTER_MAX, Duration::from_secs).min(RETRY_AFTER_MAX);
    }
    let Some(at) = http_date(text) else { return Duration::ZERO };
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    Duration::from_secs(at).saturating_sub(now).min(RETRY_AFTER_MAX)
}

/// Unix seconds of an IMF-fixdate, `Sun, 06 Nov 1994 08:49:37 GMT`: the one form that servers must send.
fn http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = text.split_once(", ")?.1.strip_suffix(" GMT")?.split(' ');
    let day: u64 = words.next()?.parse().ok().filter(|day| (1..=31).contains(day))?;
    let month_name = words.next()?;
    let month = u64::try_from(MONTHS.iter().position(|name| *name == month_name)?).ok()? + 1;
    let year: u64 = words.next()?.parse().ok().filter(|year| (1970..10_000).contains(year))?;
    let mut time = words.next()?.split(':').map(|part| part.parse::<u64>().ok().filter(|number| *number < 61));
    let (hour, minute, second) = (time.next()??, time.next()??, time.next()??);
    // Days of the civil calendar, with years that begin in March so that a leap day is the last of one.
    let (year, month) = if month < 3 { (year - 1, month + 9) } else { (year, month - 3) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 1;
    let seconds = (days.checked_sub(719_468)? * 24 + hour) * 3600 + minute * 60 + second;
    words.next().is_none().then_some(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_doubles_up_to_its_bound_and_is_a_random_part_of_it() {
        let settings = WebhookSettings::new(http::Uri::from_static("http://localhost/"));
        for (attempts, bound) in [(1, 500), (2, 1000), (3, 2000), (7, 30_000), (40, 30_000), (u32::MAX, 30_000)] {
            let pauses: Vec<_> = (0..200).map(|_| backoff(&settings, attempts)).collect();
            let bound = Duration::from_millis(bound);
            assert!(pauses.iter().all(|pause| *pause <= bound), "{attempts}");
            let (low, high) = (bound.mul_f64(0.3), bound.mul_f64(0.7));
            assert!(pauses.iter().any(|p| *p < low) && pauses.iter().any(|p| *p > high), "{attempts}: {pauses:?}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = UNIX_EPOCH + Duration::from_secs(784_111_700);
        let check = |text: &'static str, seconds: u64| {
            let got = retry_after(Some(&HeaderValue::from_static(text)), now);
            assert_eq!(got, Duration::from_secs(seconds), "{text}");
        };
        check("0", 0);
        check(" 7 ", 7);
        check("99999999999999999999999999", 86_400);
        check("Sun, 06 Nov 1994 08:49:37 GMT", 77);
        check("Sun, 06 Nov 1994 08:00:00 GMT", 0);
        check("Tue, 29 Feb 2000 00:00:00 GMT", 86_400);
        for bad in ["", "-1", "soon", "1.5", "Sun, 06 Nov 1994", "Sun, 99 Nov 1994 08:49:37 GMT", "x, y z GMT"] {
            check(bad, 0);
        }
        assert_eq!(retry_after(None, now), Duration::ZERO);
        assert_eq!(http_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(http_date("Tue, 29 Feb 2000 12:00:00 GMT"), Some(951_825_600));
        assert_eq!(http_date("Wed, 31 Dec 2025 23:59:59 GMT"), Some(1_767_225_599));
    }
}
